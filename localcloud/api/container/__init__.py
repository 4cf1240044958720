"""Kubernetes Engine v1 and v1beta1: clusters, node pools and operations, by zone and by location."""
