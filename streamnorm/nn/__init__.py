"""Modules: layers, gain and bias, time-specific and recurrent layers. None asks which backend computes."""
