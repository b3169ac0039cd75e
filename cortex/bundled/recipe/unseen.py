"""Questions and tools written by hand for the evaluation; no training template holds them."""

from typing import Any

# What the model cannot know: the honest answer is that it does not.
UNKNOWN = (
    "Why do cats purr?",
    "How do vaccines work?",
    "Who won the world cup in 1998?",
    "What is the square root of 144?",
    "Write a haiku about autumn leaves in Kyoto.",
    "Explain the causes of the First World War.",
    "How do I bake sourdough?",
    "What is the boiling point of mercury?",
    "Summarise the plot of Moby Dick.",
    "Can you refactor this function for me?",
    "What is the distance to the nearest galaxy?",
    "Who is the prime minister of Canada?",
    "How long should I boil an egg?",
    "What is the derivative of x squared?",
    "Recommend a good restaurant.",
    "Why is the ocean salty?",
    "What are the side effects of aspirin?",
    "Who composed the Four Seasons?",
    "What is blockchain?",
    "How do magnets work?",
    "What was the first video game?",
    "Is it safe to eat raw chicken?",
    "How many people live on Earth?",
    "What is the difference between TCP and UDP?",
    "Why did the Roman Empire fall?",
    "Give me a recipe for lasagna.",
    "What is the best laptop for students?",
    "How do I fix a flat tyre?",
    "Who invented the telephone?",
    "What does a heart do?",
    "Should I invest in bonds?",
    "What is photosynthesis?",
    "How do airplanes stay in the air?",
    "Which team is leading the league?",
    "Write a SQL query that joins two tables.",
    "What is the tallest building in Dubai?",
    "How do I learn to swim?",
    "What is dark matter?",
    "Where do penguins live?",
    "When did the dinosaurs die out?",
)


_PLAIN = ("string", "integer", "number")


def _tool(name: str, description: str, required: int | None = None, **types: Any) -> dict[str, Any]:
    properties = {key: {"type": kind} if kind in _PLAIN else kind for key, kind in types.items()}
    wanted = list(properties)[:required]
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": properties, "required": wanted},
        },
    }


# Each entry is a tool, a question for it, and the arguments of the right call.
CALLS: tuple[tuple[dict[str, Any], str, dict[str, Any]], ...] = (
    (_tool("get_weather", "Get the weather.", city="string"),
     "What is the weather in Reykjavik?", {"city": "Reykjavik"}),
    (_tool("get_weather", "Get the weather.", location="string"),
     "How is the weather in Tallinn today?", {"location": "Tallinn"}),
    (_tool("get_weather", "Current weather in a city", 1, city="string",
           unit={"type": "string", "enum": ["celsius", "fahrenheit"]}),
     "What's the weather in Valencia in celsius?", {"city": "Valencia", "unit": "celsius"}),
    (_tool("book_hotel", "Book a hotel in a city.", city="string", nights="integer"),
     "Book a hotel in Salzburg for 3 nights", {"city": "Salzburg", "nights": 3}),
    (_tool("get_recipe", "Get a recipe for a dish.", dish="string"),
     "Get the recipe for goulash", {"dish": "goulash"}),
    (_tool("lookup_word", "Look up a word in the dictionary.", word="string"),
     "Look up the word serendipity", {"word": "serendipity"}),
    (_tool("create_ticket", "Create a support ticket.", title="string"),
     'Create a ticket with title "printer broken"', {"title": "printer broken"}),
    (_tool("add", "Add two numbers.", a="integer", b="integer"),
     "Add 417 and 58", {"a": 417, "b": 58}),
    (_tool("calculate_sum", "Returns the sum of two numbers.", x="number", y="number"),
     "What is 12 plus 30?", {"x": 12, "y": 30}),
    (_tool("get_time", "Get the current time in a city.", city="string"),
     "What time is it in Lausanne?", {"city": "Lausanne"}),
    (_tool("send_email", "Send an email.", to="string", subject="string"),
     "Send an email to petra@firm.org with subject invoice",
     {"to": "petra@firm.org", "subject": "invoice"}),
    (_tool("read_file", "Read a file.", path="string"),
     "Read the file /srv/app/settings.yaml", {"path": "/srv/app/settings.yaml"}),
    (_tool("search", "Search the web.", query="string"),
     "Search for electric bicycles", {"query": "electric bicycles"}),
    (_tool("search_products", "Search products in the shop.", query="string"),
     "Search products for garden hose", {"query": "garden hose"}),
    (_tool("translate", "Translate text.", text="string", language="string"),
     'Translate "good evening" to Portuguese', {"text": "good evening", "language": "Portuguese"}),
    (_tool("play_song", "Play a song.", title="string"),
     "Play Bohemian Rhapsody", {"title": "Bohemian Rhapsody"}),
    (_tool("set_volume", "Set the volume.", level="integer"),
     "Set the volume to 35", {"level": 35}),
    (_tool("delete_user", "Delete a user.", user_id="integer"),
     "Delete the user with user_id 9921", {"user_id": 9921}),
    (_tool("get_stock_price", "Get the price of a stock.", symbol="string"),
     "What is the stock price of NVDA?", {"symbol": "NVDA"}),
    (_tool("run_query", "Run a database query.", query="string", limit="integer"),
     "Run the query with query users and limit 25", {"query": "users", "limit": 25}),
)  # fmt: skip
