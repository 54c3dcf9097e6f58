"""`keepwarm run`: producer, collector, workers and RabbitMQ on one machine."""
