"""Prompts: what is to be segmented in a picture.

`parser` reads prompt files, `schema` defines their form and JSON Schema, `run_lengths` reads the
masks in them, `mask_files` has the names of masks beside the picture, `importers` read annotation
files of other programs, `foreign_formats` recognises such files where a prompt file is expected.
"""
