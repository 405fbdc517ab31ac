from posterity.timeseries.timesnet import TimesBlock as TimesBlock
from posterity.timeseries.timesnet import TimesNet as TimesNet
from posterity.timeseries.timesnet import TimesNetClassifier as TimesNetClassifier
from posterity.timeseries.timesnet import TimesNetDetector as TimesNetDetector
from posterity.timeseries.timesnet import TimesNetForecaster as TimesNetForecaster
from posterity.timeseries.timesnet import TimesNetImputer as TimesNetImputer
from posterity.timeseries.timesnet import dominant_periods as dominant_periods
