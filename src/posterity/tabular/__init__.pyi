from posterity.tabular.tangos import TangosClassifier as TangosClassifier
from posterity.tabular.tangos import TangosPenalty as TangosPenalty
from posterity.tabular.tangos import TangosRegressor as TangosRegressor
from posterity.tabular.tangos import TangosTerms as TangosTerms
from posterity.tabular.tangos import latent_attributions as latent_attributions
from posterity.tabular.tangos import tangos_terms as tangos_terms
