from posterity.tabular.attributions import latent_attributions as latent_attributions
from posterity.tabular.tangos import TangosPenalty as TangosPenalty
from posterity.tabular.tangos import TangosTerms as TangosTerms
from posterity.tabular.tangos import tangos_terms as tangos_terms
from posterity.tabular.tangos_estimators import TangosClassifier as TangosClassifier
from posterity.tabular.tangos_estimators import TangosRegressor as TangosRegressor
