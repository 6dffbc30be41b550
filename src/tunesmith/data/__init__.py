"""Rows of any schema to token ids with exact masks, counted: files, formats, templates, masks, packing."""
