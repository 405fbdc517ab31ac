from posterity.uncertainty.esd import ESDLoss as ESDLoss
from posterity.uncertainty.esd import ESDMetric as ESDMetric
from posterity.uncertainty.esd import MMCELoss as MMCELoss
from posterity.uncertainty.esd import SBECELoss as SBECELoss
from posterity.uncertainty.esd import expected_squared_difference as expected_squared_difference
from posterity.uncertainty.esd import interleave as interleave
