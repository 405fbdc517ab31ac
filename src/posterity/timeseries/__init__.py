"""Time series: forecasting, filling gaps, anomalies, classification."""

from posterity.papers import serve

__getattr__, __dir__ = serve(__name__)
