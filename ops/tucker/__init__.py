"""Tucker changes of weights (FLoRA): composition, linear layers, convolutions."""
