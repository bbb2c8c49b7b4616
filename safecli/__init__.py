"""Make a language model leave its own unsafe answers, and prove what changed."""

__version__ = "0.1.0"
