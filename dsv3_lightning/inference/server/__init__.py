"""An OpenAI-compatible server over an engine. Needs the `serve` extra, Starlette and uvicorn."""
