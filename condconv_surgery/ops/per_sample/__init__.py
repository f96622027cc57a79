"""What implementations and backends share: mix the kernel of each sample, convolve with it, cut a batch into blocks."""
