"""The web app: one file per page, and the service that draws for them."""
