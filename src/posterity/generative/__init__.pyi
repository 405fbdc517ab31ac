from posterity.generative.rectified_flow import RectifiedFlow as RectifiedFlow
from posterity.generative.rectified_flow import Trajectory as Trajectory
from posterity.generative.rectified_flow import reflow as reflow
from posterity.generative.rectified_flow import straightness as straightness
from posterity.generative.rectified_flow import transport_cost as transport_cost
