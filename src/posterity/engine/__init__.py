"""The engine: claims become trials, trials are run and stored, and judged. It names no paper."""
