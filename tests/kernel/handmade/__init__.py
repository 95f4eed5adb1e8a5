"""What `kernel.write` packs, packed by hand from the kernel's headers: an independent check of every byte.

It was the product's own code until pyroute2's classes took its place (docs/decisions/0027). It changes only if the
product packs something new.
"""
