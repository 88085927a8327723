// Tables within .sortable are sorted by a click, Enter or Space on a column's head. A cell counts by its first number
// ("0.49 (0.44 to 0.52)", "5.2 → 2.3"), a cell without one by its words, an empty one ("–") comes last.
(function () {
  const key = (row, column) => row.cells[column].textContent.trim().replace(/,(?=\d{3})/g, "");
  const number = (text) => {
    const found = text.match(/[-+−]?\d+(\.\d+)?/);
    return found ? Number(found[0].replace("−", "-")) : NaN;
  };
  function sort(head) {
    const table = head.closest("table");
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of head.parentElement.cells) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const words = head.cellIndex === 0;
    const rows = [...table.tBodies[0].rows];
    rows.sort((one, two) => {
      const [a, b] = [key(one, head.cellIndex), key(two, head.cellIndex)];
      if (words) return down ? a.localeCompare(b) : b.localeCompare(a);
      const [x, y] = [number(a), number(b)];
      if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y);
      return down ? y - x : x - y;
    });
    table.tBodies[0].append(...rows);
  }
  function prepare() {
    for (const head of document.querySelectorAll(".sortable thead th")) {
      head.tabIndex = 0;
      head.setAttribute("aria-sort", "none");
      head.addEventListener("click", () => sort(head));
      head.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        sort(head);
      });
    }
  }
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", prepare);
  else prepare();
})();
