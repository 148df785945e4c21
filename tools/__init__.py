"""Developers' tools. Nothing in the package imports them; run them from the checkout (`python -m
tools.NAME`).
"""
