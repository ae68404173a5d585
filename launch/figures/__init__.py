"""``trellis figures``: what a run's gates and memories do, as a page."""
