"""Connect to a RabbitMQ server: `connection`."""
