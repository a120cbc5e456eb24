"""Audits of a run: is influence from stored trajectories right?"""
