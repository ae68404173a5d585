"""The study: does Trellis win on real novels? docs/study.md has the method and what was found."""
