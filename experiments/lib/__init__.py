"""What the launchers share, each thing once.

`launch` (flags, errors, Ctrl-C), `workdir` (what is kept in --workdir), `data` (images, tables and
labels), `networks` and `training` (finite networks), `report` (tables, fits, figures).
"""
