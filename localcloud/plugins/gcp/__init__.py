"""The stand-in for the Pulumi plugin 'gcp'."""
