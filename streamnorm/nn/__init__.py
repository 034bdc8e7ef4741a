"""Modules: layers, gain and bias, time-specific and recurrent layers. None depends on the backend."""
