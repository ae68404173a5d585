"""RULER's synthetic questions (arXiv 2404.06654), written anew: needles, variable tracking, common words."""
