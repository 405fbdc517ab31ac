from posterity.federated import simulation as simulation
