from posterity.fairness.beta_gap import violation_probability as violation_probability
from posterity.fairness.fairee import FaiREE as FaiREE
from posterity.fairness.group_thresholds import FairThresholds as FairThresholds
from posterity.fairness.group_thresholds import fair_thresholds as fair_thresholds
