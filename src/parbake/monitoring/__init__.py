"""Monitoring: the prediction log and the profile of the traffic."""
