from posterity.generative.flow_ode import Trajectory as Trajectory
from posterity.generative.rectified_flow import RectifiedFlow as RectifiedFlow
from posterity.generative.straightening import reflow as reflow
from posterity.generative.straightening import straightness as straightness
from posterity.generative.straightening import transport_cost as transport_cost
