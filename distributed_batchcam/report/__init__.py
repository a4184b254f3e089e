"""What a run looks like: figures of prototypes and class maps."""
