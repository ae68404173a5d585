"""``trellis plan``: memory, traffic and seconds of a recipe before it runs, and meshes that fit."""
