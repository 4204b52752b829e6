"""A saved student at work: loaded from weights or a program, run on image files, and what it costs."""
