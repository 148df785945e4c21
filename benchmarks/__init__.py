"""Measurements that are no command of the program: `make bench` runs them and puts their figures
into the docs.
"""
