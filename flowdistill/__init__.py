"""flowdistill: pretrained flow and diffusion models in 1 to 8 network calls."""

__version__ = "0.1.0"
