from posterity.testing.estimator import check_estimator as check_estimator
from posterity.testing.generative import check_generative as check_generative
from posterity.testing.graph_network import check_graph_network as check_graph_network
from posterity.testing.layer import check_layer as check_layer
from posterity.testing.loss import check_loss as check_loss
from posterity.testing.metric import check_metric as check_metric
from posterity.testing.neural_process import check_neural_process as check_neural_process
from posterity.testing.solver import check_solver as check_solver
