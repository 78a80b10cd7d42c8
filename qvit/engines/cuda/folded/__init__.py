"""Constants of an `IntegerModel` by what they are of, padded and folded; `qvit.engines.cuda.constants` has all of them."""
