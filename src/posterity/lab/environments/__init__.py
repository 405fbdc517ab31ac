"""Small environments that Gymnasium lacks.

Each is a world: a pure batched transition, arrays in and arrays out, from which `world_env` makes the
`gymnasium.Env` that every agent takes.
"""

from posterity._names import serve_files

__getattr__, __dir__ = serve_files(__name__)
