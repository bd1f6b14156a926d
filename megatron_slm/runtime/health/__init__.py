"""Health of a run: dead, hung and slow ranks, found over connections beside those of torch.distributed."""
