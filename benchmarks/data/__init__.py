"""What the data pipeline costs: reading batches, and the time to the first one."""
