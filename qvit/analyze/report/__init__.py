"""The page of `qvit report`: figures as inline SVG (Matplotlib), a template (Jinja), no file or network beside it.

`theme` holds colours, `svg` turns a Matplotlib figure into an element of the page, `page` assembles sections; each other file
draws the figures of one section from the dataclasses of `qvit.analyze`.
"""
