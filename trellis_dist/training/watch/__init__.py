"""What watches a run: hangs, stragglers, replicas that drift apart, losses that leap, and what they leave."""
