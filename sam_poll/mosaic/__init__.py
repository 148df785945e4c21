"""`sam-poll mosaic`: pictures larger than memory, cut into tiles, segmented one by one, and put together again.

What can still go wrong here: an object that neither of two tiles has found ends nowhere; one that only one of them has
found ends at their seam.
"""
