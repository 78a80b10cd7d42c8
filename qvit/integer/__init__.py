"""The integer model: the op table, packing, freezing and the `.qvit` file.

Everything but `freeze` needs NumPy alone. Engines (`qvit.engines`) read it; nothing here depends on them.
"""
