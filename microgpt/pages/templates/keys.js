addEventListener("keydown", function (event) {
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
  if (event.target.closest("pre, .scroll, table, input")) return;
  var stops = Array.from(document.querySelectorAll("[data-stop]"));
  var here = stops.findIndex(function (stop) { return "#" + stop.id === decodeURIComponent(location.hash); });
  var next = stops[here + (event.key === "ArrowRight" ? 1 : -1)];
  if (!next) return;
  event.preventDefault();
  location.hash = next.id;
  next.querySelector("a, h3").focus({ preventScroll: true });
});
