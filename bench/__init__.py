"""What a step costs, in hctrain and in its peers: paired measurements in CPU seconds, plain Adam as the unit"""
