// The arrow keys go from stop to stop. Without this script, the links do.
let settling;
addEventListener("keydown", (event) => {
  const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!way || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  if (event.target.closest(".scroll")) return; // which the key scrolls
  const stops = [...document.querySelectorAll("[data-stop]")];
  const place = event.target.closest("[data-stop]");
  const here = place ? stops.indexOf(place) : stops.findIndex((stop) => "#" + stop.id === location.hash);
  const next = stops[here + way];
  if (!next) return;
  event.preventDefault();
  next.scrollIntoView();
  next.querySelector("[tabindex='-1']").focus({ preventScroll: true });
  clearTimeout(settling); // browsers ignore an address that changes too often
  settling = setTimeout(() => location.replace("#" + next.id), 200);
});
