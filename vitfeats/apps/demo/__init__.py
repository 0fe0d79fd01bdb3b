"""A demo in a browser: explore, match, splice, style and hyperfeatures, with one's own pictures.

Reads as: intake → studio → drawing → looking, making → parts → page → serving.
"""

from vitfeats.apps.demo.serving import Served, serve, serving

__all__ = ["Served", "serve", "serving"]
