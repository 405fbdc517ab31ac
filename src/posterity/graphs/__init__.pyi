from posterity.graphs.a_dgn import ADGN as ADGN
from posterity.graphs.a_dgn import AntiSymmetricConv as AntiSymmetricConv
from posterity.graphs.a_dgn import euler_step_limit as euler_step_limit
from posterity.graphs.a_dgn import local_jacobian_eigenvalues as local_jacobian_eigenvalues
