from posterity.fairness.fairee import FaiREE as FaiREE
from posterity.fairness.fairee import FairThresholds as FairThresholds
from posterity.fairness.fairee import fair_thresholds as fair_thresholds
from posterity.fairness.fairee import violation_probability as violation_probability
