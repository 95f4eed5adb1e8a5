"""What the kernel tells, read into values. Nothing here packs; `kernel.write` does."""
