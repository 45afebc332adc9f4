"""Requests and responses of the HTTP API, as pydantic models: /openapi.json is made from them."""
