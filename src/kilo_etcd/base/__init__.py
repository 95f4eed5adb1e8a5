"""Small helpers below everything else: texts, addresses, files, descriptors, retries."""
